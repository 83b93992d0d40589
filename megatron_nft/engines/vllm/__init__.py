"""vLLM: its client, command line, weight updates and memory calls. kind.py joins them; worker/ runs inside vLLM."""
