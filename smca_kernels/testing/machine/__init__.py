"""A machine that executes, on a CPU, the PTX that Triton compiles for sm_80, sm_86, sm_89 and sm_90, and checks it.

Triton's interpreter runs what a kernel says; a GPU runs what the compiler made of it. Between the two are layouts,
shared memory, asynchronous copies, tensor-core fragments and barriers, and this machine executes those. It catches the
project's own launches: backend="triton" on CPU tensors returns what the compiled kernels compute, with gradients.

    with smca_on_machine(90, order="shuffled", at_once=3) as session:  # of .launcher
        out = smca_attention(…, backend="triton")
    print(session.faults.report())

Triton has to be imported without TRITON_INTERPRET; `processes` makes processes in which it is. `check` holds a case of
smca_kernels.testing.cases against its error budget, and `run_kernel` executes one launch of any Triton kernel.

How it works. `ptx` parses the text into blocks of instructions. `codegen` makes each block a Python function over rows,
where a row is one register of all threads of one to four CTAs; `instructions` has a handler for every opcode, and what
none knows raises PtxError, so that nothing is passed over. `execution` schedules threads: where they part, the block
that comes first in topological order runs first, so that they meet where their paths join. `memory` and
`shared_memory` keep shadow state beside every byte, from which come the faults.

What is checked, and reported as a fault of a kind of `memory.KINDS`:

- memcheck: accesses outside of a tensor (every argument has addresses of its own), outside of a view inside its
  storage, outside of the shared memory that was asked for, and misaligned ones;
- initcheck: reads of what torch.empty left, of shared memory that nobody wrote, and results with unwritten bytes;
- racecheck: two warps between barriers, two lanes of a warp without bar.warp.sync, two CTAs without a release and an
  acquire; threads of one instruction that write different values to one place, and sums over lanes that end with
  different bits;
- cp.async: bytes of a copy that is under way, read, written, or left at the end;
- wgmma: shared memory and registers that one under way uses, descriptors that are not uniform;
- proxy fences: a wgmma that reads what was written with no fence.proxy.async since;
- synccheck: barriers that a part of a warp or of a CTA reaches.

What is exact. Fused multiply-add rounds once. ex2, lg2, rcp, sqrt, rsqrt, div.full and div.approx are correctly
rounded, or err by as much as PTX lets them (`arithmetic.perturbed`). Products of tensor cores are exact and their sums
rounded once, or aligned and cut as the hardware has been measured to (`tensor_cores.truncating`). tf32 operands are cut
to 19 bits. NaN of min and max, .ftz and saturation are as in the PTX manual. A NaN's bits are those of x86.

What is outside. ptxas: what it makes of this PTX, its bugs and its serialised wgmma. Timing, all of it. Warps that run
apart between barriers (the shadow state reports what they could do to each other). A global read that a later write of
another CTA overtakes. Kernels with TMA, mbarriers, clusters, tcgen05, local memory, device functions or printf, and
other forms of what is executed, raise NotImplementedError or PtxError.

tests/machine holds the machine against kernels whose results are known, plants faults of every kind in them and takes
their barriers away; tests/machine/hunt.py runs the project's kernels widely.
"""
