"""Credit, objective and optimizer step; knows no process."""
