"""One HTML page about one run or several: history.py reads a run's folder, figures.py plots, pictures.py shows mistakes, page.py writes."""
