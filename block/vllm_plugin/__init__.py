"""What is loaded inside vLLM, and nowhere else: vLLM itself is neither patched nor forked.

python -m block.vllm_plugin.serve --model …     a vLLM server that publishes its scheduler's state
"""
