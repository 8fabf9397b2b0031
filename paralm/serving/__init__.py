"""A trained model behind HTTP: OpenAI-compatible completions, streamed or whole, with sessions that keep the state.

``paralm serve RUN`` runs it alone; :mod:`paralm.serving.ray_serve` as a deployment of Ray Serve. The parts:
``settings`` (limits, key, address), ``protocol`` (what requests and answers look like), ``sessions`` (states kept
between requests), ``engine`` (one thread that steps all requests together), ``app`` (the FastAPI application).
"""
