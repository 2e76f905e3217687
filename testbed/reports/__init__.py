"""What a reader is shown of runs: exhibits (tables and figures, as plain data), and every form they are printed in.

exhibits   the nouns: Table, Figure
tables     the tables of a set of runs
figures    the figures of a set of runs
page       one HTML page that stands alone
paper      files for a paper: PDF, SVG, PNG; LaTeX, CSV, Markdown
plot       a figure drawn by matplotlib, for both of them

All forms print the same exhibits, so that a number is the same wherever it stands.
"""
