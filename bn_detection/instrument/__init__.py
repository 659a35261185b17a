"""The instrument in Python: any detector that is built, and its images."""
