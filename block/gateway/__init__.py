"""The gateway: HTTP with OpenAI's API, and all else that vLLM serves, over a `Dispatcher` in front of vLLM servers.

app                 routes, start and stop
client_connections  requests read from clients, and answers written to them
exchange            one request: placed, sent, its answer passed on, or begun anew
server_connections  requests written to a server, and answers read from it
http1, sse, openai  what is on these wires: HTTP/1.1, events, bodies
routes, models      which paths are what; which server has which model
groups              models with a policy of their own: prompts read, requests placed
upstreams           the servers as instances, of the kind that the policy needs
forecasts           forecasts for servers that may differ
responses           which server keeps which response
modelled            those without the plugin, by what was sent to them
watch               which of them hang, and are well again
discovery, fleet    where servers are; how they join and leave
keys, admin         who may ask; what changes servers and their list
workers             several processes on one port
prompts, prefixes   prompts as tokens or pieces of text; what caches have of them
estimates           how long a response will be
metrics             what /metrics says
config, urls        the node `gateway`
"""
