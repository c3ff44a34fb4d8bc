"""The web page: the day's papers, search, votes, a digest by mail, and runs that one can watch.

`settings` is read from the environment, `tables` is what is stored, `db` opens it; each other module is one part of the page
and has its own ``router``, which `app` puts together. Nothing here is imported by the library or by other commands.
"""
