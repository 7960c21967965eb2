"""The models behind the rewards, a file for each family, and rewards that are served over HTTP."""
