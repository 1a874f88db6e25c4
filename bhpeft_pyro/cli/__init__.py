"""The program `bhpeft`: its commands by what they are for; `app.py` puts them together."""
