"""Where the async client and its sync twin differ; everything above is written once.

`aio` and `blocking` have the same names. The async code in `forkpoint._async` imports `aio`;
`tools/unasync_client.py` makes `forkpoint._sync` of it, which imports `blocking`.
"""
