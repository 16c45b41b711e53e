"""Ladders, the level loop, and its two drivers."""
