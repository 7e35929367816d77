"""Which instance takes a request: the dispatcher, its policies, and what is done to forecasts for them."""
