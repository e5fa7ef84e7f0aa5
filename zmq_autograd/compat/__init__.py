"""Programs written on `torch.distributed.rpc` move over by changing their imports.

`rpc`, `autograd`, `optim` and `nn` have the names of torch's modules; they are doors to the rest of
the package.  What differs: a process says which modules' functions others may call.
"""
