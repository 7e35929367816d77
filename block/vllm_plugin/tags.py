"""Keys of a request's `vllm_xargs`, by which a dispatcher tells the plugin what it knows of the request."""

TAG_ID = "block_id"
"""Its number in the run, or in the gateway; not negative."""

TAG_EXPECTED = "block_expected"
"""The response tokens expected of it."""
