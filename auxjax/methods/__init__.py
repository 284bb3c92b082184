"""Methods of auxiliary learning, all with one interface (`auxjax.Method`), by name.

    auxjax.methods.get("jtds", outer_optimizer=optax.adam(1e-2))

A method is a function of its options in a file of its own name, where it registers itself (`register`) with what
`info` tells of it. One line here imports it.
"""

from auxjax.interface import Context as Context
from auxjax.interface import Method as Method
from auxjax.interface import TaskLosses as TaskLosses
from auxjax.interface import TaskModel as TaskModel
from auxjax.methods._adaloss import adaloss as adaloss
from auxjax.methods._arml import arml as arml
from auxjax.methods._auto_lambda import auto_lambda as auto_lambda
from auxjax.methods._auxilearn import auxilearn as auxilearn
from auxjax.methods._auxinash import auxinash as auxinash
from auxjax.methods._cosine_similarity import cosine_similarity as cosine_similarity
from auxjax.methods._dtg_auxl import dtg_auxl as dtg_auxl
from auxjax.methods._dwa import dwa as dwa
from auxjax.methods._equal import equal as equal
from auxjax.methods._fixed_weights import fixed_weights as fixed_weights
from auxjax.methods._gradnorm import gradnorm as gradnorm
from auxjax.methods._grid_search import grid_search as grid_search
from auxjax.methods._jtds import jtds as jtds
from auxjax.methods._maoal import maoal as maoal
from auxjax.methods._maxl import maxl as maxl
from auxjax.methods._n_jtds import n_jtds as n_jtds
from auxjax.methods._ol_aux import ol_aux as ol_aux
from auxjax.methods._random_labels import random_labels as random_labels
from auxjax.methods._random_weights import random_weights as random_weights
from auxjax.methods._registry import MethodInfo as MethodInfo
from auxjax.methods._registry import get as get
from auxjax.methods._registry import info as info
from auxjax.methods._registry import names as names
from auxjax.methods._registry import register as register
from auxjax.methods._rl_aux import rl_aux as rl_aux
from auxjax.methods._stl import stl as stl
from auxjax.methods._uncertainty import uncertainty as uncertainty
from auxjax.methods._wamal import wamal as wamal
from auxjax.methods.shared.generation import Generator as Generator
from auxjax.methods.shared.policy import Policy as Policy
