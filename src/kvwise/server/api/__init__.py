"""OpenAI's routes: what a request may ask for, and how it is answered."""
