"""What is done with the method: comparing cures, measuring speed, explaining, exercises, maps."""
