"""Tools that keep notebooks, package, README and site in step.

`notebooks` reads, `run` executes, `readme` and `stage` translate, `check` compares,
`api` and `site` build the documentation. None of it is imported by the package.
"""
