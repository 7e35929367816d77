"""Which instance takes a request: the dispatcher, its policies, and what makes forecasts for them."""
