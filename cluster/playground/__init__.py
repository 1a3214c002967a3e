"""The page a browser gets from a router: chat with pictures and video, and a look at what the model did with them.

``static`` holds it: HTML, CSS and JavaScript modules as the browser loads them, without a build step and without
anything from elsewhere. It uses the public HTTP API of the router it came from, and nothing else.
"""
