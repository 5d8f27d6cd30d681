"""Schedules of the learning rate that are made of others."""
