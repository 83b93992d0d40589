"""One self-contained HTML page about a run or an evaluation: curves, tables and a browser of answers."""
