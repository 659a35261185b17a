"""The statistics that inference uses: how workers come to hold the same ones."""

from .average import AverageStatistics, average_running_statistics

__all__ = ["AverageStatistics", "average_running_statistics"]
