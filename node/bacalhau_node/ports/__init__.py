"""What the node needs from the outside, as Protocols: one contract suite each, fakes included.

The engine and the node know only these. Adapters (executors, sources, content, transports,
journal) implement them and never import each other.
"""

from bacalhau_node.ports.content import ContentStore as ContentStore
from bacalhau_node.ports.content import Draft as Draft
from bacalhau_node.ports.content import Provider as Provider
from bacalhau_node.ports.content import Scope as Scope
from bacalhau_node.ports.executor import Capabilities as Capabilities
from bacalhau_node.ports.executor import Executor as Executor
from bacalhau_node.ports.executor import ExecutorEvent as ExecutorEvent
from bacalhau_node.ports.executor import Gpu as Gpu
from bacalhau_node.ports.executor import RawOutcome as RawOutcome
from bacalhau_node.ports.executor import RawValue as RawValue
from bacalhau_node.ports.executor import ShardLines as ShardLines
from bacalhau_node.ports.executor import ShardStarted as ShardStarted
from bacalhau_node.ports.executor import ShardTask as ShardTask
from bacalhau_node.ports.executor import StagedFile as StagedFile
from bacalhau_node.ports.executor import Target as Target
from bacalhau_node.ports.journal import Journal as Journal
from bacalhau_node.ports.places import Access as Access
from bacalhau_node.ports.places import Publisher as Publisher
from bacalhau_node.ports.places import Source as Source
from bacalhau_node.ports.places import Told as Told
from bacalhau_node.ports.transport import Answering as Answering
from bacalhau_node.ports.transport import Arrival as Arrival
from bacalhau_node.ports.transport import Packet as Packet
from bacalhau_node.ports.transport import Transport as Transport
from bacalhau_node.ports.transport import Waiting as Waiting
