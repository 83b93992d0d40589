"""SGLang: its client, command line, weight updates, memory calls and router. kind.py joins them."""
