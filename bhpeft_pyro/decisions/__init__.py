"""What to do about forecasts."""
