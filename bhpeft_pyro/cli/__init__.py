"""The program `bhpeft`: one command a file, `app.py` puts them together."""
