"""The ops TD-MPC2 is made of, each with its plain-torch implementation.

Knows torch (and, where kernels exist, triton) only. Every op names the maths, not the
backend. Shapes use one legend throughout the project:

    E environments   N samples    P policy-prior samples   H horizon   K bins
    L latent         A action     T task embedding         B batch     D mlp width
    Q critics        V SimNorm group
"""
