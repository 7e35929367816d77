"""The twin of vLLM's scheduler, many engines of it, and the forecasts made with it."""
