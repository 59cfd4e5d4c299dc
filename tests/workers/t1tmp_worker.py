from pathlib import Path
import os, time
from nemo_rlhf.parallel import state
from tests.workers.parallel_worker import *
def go(directory):
    out=[]
    for cut in (Cut(2),Cut(),Cut(2,1,True),Cut(1,2)):
        state.initialize(cut.tp,cut.pp,1)
        model=open_model("policy",cut,Path(directory))
        model.make_trainable(OPTIM,4)
        a=evaluate(model,"policy")
        diffs=[]
        junk=[]
        for i in range(60):
            junk.append(torch.empty(torch.randint(1,5000,(1,)).item()))
            if i%7==0: junk=junk[::2]
            d=(evaluate(model,"policy")-a).abs().max(-1).values
            if d.max()>0: diffs.append((i,d.tolist(), ((evaluate(model,"policy")-a).abs()>0).sum(-1).tolist()))
        out.append((cut,diffs))
    return out
