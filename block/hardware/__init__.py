"""GPUs and models: their data sheets, and how long a step takes on them."""
