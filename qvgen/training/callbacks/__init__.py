"""Callbacks of a training: schedules and metrics, validation videos, averages, and what holds for a user's own."""
