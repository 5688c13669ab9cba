"""Packages that a job asks for, installed beside its environment and kept for the next job."""
