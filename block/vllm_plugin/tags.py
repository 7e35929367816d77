"""Keys of a request's `vllm_xargs`, by which a dispatcher tells the plugin what it knows of the request."""

TAG_ID = "block_id"
"""Its number in the run, or in the gateway; not negative."""

TAG_EXPECTED = "block_expected"
"""The response tokens expected of it."""

TAG_RESPONSE = "block_response"
"""The token ids that an emulated GPU is to answer, so that what goes on from them finds them cached."""
