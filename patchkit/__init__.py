"""patchkit: Git for what a language model knows."""
