"""Starts the workers of a job, and reports the first failure among them."""

from .launch import STOP_SIGNALS, Stopped, WorkerError, launch, restarted, run

__all__ = ["STOP_SIGNALS", "Stopped", "WorkerError", "launch", "restarted", "run"]
