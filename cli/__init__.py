"""The parts of cli_demo.py: session (state), commands, settings, transcript, display (output) and terminal (input)."""
