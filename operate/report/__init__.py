"""One HTML page about one run or several: run.py reads, figures.py plots, page.py and page.html.j2 write."""
