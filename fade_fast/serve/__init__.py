"""A server on one machine: an engine that owns the model, its HTTP interface, and a page that shows caches.

| module | what it knows |
|---|---|
| `engine.py` | one thread that runs the model for all requests |
| `waiting.py` | who is next: a fair, bounded queue |
| `prefixes.py` | the caches that are kept, in memory and on disk |
| `protocol.py` | the JSON of OpenAI's interface |
| `app.py`, `limits.py` | HTTP |
| `metrics.py`, `view.py` | what is told about all of this |
| `page/`, `report.py` | how it is shown |

`engine.py`, `waiting.py`, `prefixes.py`, `metrics.py`, `view.py` and `report.py` need no packages of the
extra `serve`.
"""
