"""Block: predictive load balancing for LLM serving."""
