"""Searches: a sweep over numbers and seeds, and the learning-rate range test."""
