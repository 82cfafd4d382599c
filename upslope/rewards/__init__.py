"""Texts to scores. Importing this package imports nothing slow: reward workers start with it."""
