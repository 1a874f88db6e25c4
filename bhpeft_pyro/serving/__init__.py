"""A service that answers texts with a saved round, over HTTP (`bhpeft serve`)."""
