"""The embedded default: a small made-up world of posts and summaries with a known gold reward, and the run that learns it."""
