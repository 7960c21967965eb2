"""What surrounds the loop of grpo.py: flags, prompts, run folder, log, and several processes."""
