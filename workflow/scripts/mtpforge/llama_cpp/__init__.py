"""llama.cpp: its build, its programs, and what they support."""
