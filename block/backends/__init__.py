"""What instances are made of: engine twins, or real vLLM servers on GPUs, on a CPU, or with the GPU emulated."""
