"""The bronze-medal method as published, for comparison."""
