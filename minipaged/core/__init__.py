"""Deciding over integers: blocks, block tables, requests, the scheduler. Never an array."""
