"""The front door: an OpenAI-compatible HTTP server over a `Dispatcher`, in front of any set of vLLM servers.

openai     what a request asks for, and errors as OpenAI words them
upstreams  the servers as instances
exchange   one request, proxied
estimates  how long its response will be
metrics    what /metrics says
door       routes, probes, start and stop
"""
