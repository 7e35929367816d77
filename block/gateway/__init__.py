"""The gateway: an OpenAI-compatible HTTP server over a `Dispatcher`, in front of any set of vLLM servers.

app        routes, probes, start and stop
proxy      one request, proxied
openai     what a request asks for, and errors as OpenAI words them
upstreams  the servers as instances
transport  HTTP to them
estimates  how long a response will be
metrics    what /metrics says
config     the node `gateway`
"""
