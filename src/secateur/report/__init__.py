"""A run, or several side by side, as one HTML file to look at: RUN/report.html. Serves `secateur report RUN…`.

reading (what the files of a run say) → curves, kept, outcome (figures by matplotlib), tables → page (one template).
The file needs no network and no other file, and shows all that it has without scripts, which sort, filter and point.
"""
